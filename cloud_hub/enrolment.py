"""How nodes get in, stay in and are thrown out: invitations, certificates, renewals, revocation. Called in threads.

    invite --token--> enrol --certificate (7 days)--> renew, renew, ...      limited by revocation, not by time
                                                  \\-> revoke | forget

One transaction decides each step, so that of a hundred uses of one token one succeeds.
"""

from __future__ import annotations

import base64
import hmac
import logging
import secrets
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from msgspec.structs import replace

from cloud_hub.auth import hash_token
from cloud_hub.authority import Authority, Certificate
from cloud_hub.certificate_requests import PublicKey, general_names, key_fingerprint, read_request
from cloud_hub.documents import Documents, node_scope
from cloud_hub.errors import Conflict, Forbidden
from cloud_hub.identity_records import Invitation, Known
from cloud_hub.records import Issued, Records
from cloud_hub.rollout import Node
from cloud_hub.storage import Storage
from models.errors import InvalidRequest, NotFound, TryAgain, Unauthenticated
from sync.clock import Clock
from sync.enrol_messages import Enrol, Enrolled, Leave, Renew, Token, proof_bytes, read_token
from sync.errors import Malformed
from sync.topics import check_name, check_node_id

TOKEN_SECONDS = 86_400.0
NONCE_SECONDS = 120.0
MAX_NONCES = 20_000
"""Nonces remembered as used. A storm of more renewals within two minutes only makes the oldest usable twice, by their owner."""
MAX_NAMES = 16
MAX_CERTIFICATES = 12
"""Certificates of one node within an hour. It needs one in two days; each that is not used any more stands on the revocation
list for a week, and everybody whose answers are lost comes again after minutes."""
HOUR = 3600.0
FORMER_KEYS = 8
"""Newest ended keys of a node that a refused proof is compared with."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Public:
    """What nodes are told: broker and file addresses, best first. () = the node uses the address it joined by."""

    brokers: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


class Enrolment:
    """`trust`: name and content of the file that nodes pin."""

    def __init__(
        self,
        storage: Storage,
        documents: Documents,
        authority: Authority,
        clock: Clock,
        trust: Callable[[], tuple[str, bytes]],
        public: Public | None = None,
    ) -> None:
        self._storage = storage
        self._documents = documents
        self._clock = clock
        self._trust = trust
        self._nonces = Nonces(clock)
        self.authority = authority
        self.public = public or Public()

    def invite(self, invitation: Invitation, seconds: float = TOKEN_SECONDS) -> Token:
        """A token for one node, good once. An id that was revoked may be invited again; its old keys stay refused.

        Raises Malformed for an id no node may have, Conflict while the node has a key that counts.
        """
        now = self._clock.wall()
        check_node_id(invitation.node)
        for group in invitation.groups:
            check_name("group", group)
        if len(invitation.names) > MAX_NAMES:
            raise InvalidRequest(f"names: at most {MAX_NAMES}")
        general_names(invitation.names)
        token = Token(secrets.token_urlsafe(32), self.authority.pin())
        with self._storage.write() as records:
            if records.identities.current(invitation.node):
                raise Conflict(f"{invitation.node} is enrolled; revoke it before it is enrolled again")
            records.identities.forget_invitations(now - 30 * TOKEN_SECONDS)
            records.identities.invite(hash_token(token.secret), replace(invitation, expires=now + seconds), now)
        return token

    def enrol(self, request: Enrol) -> tuple[Enrolled, list[Issued]]:
        """A certificate for a token, once; and the documents the new node changes. Whoever used it may ask again with the same
        key, in case the answer was lost, while the token is young.

        Raises Unauthenticated for a token that is unknown, used or over, Conflict for a key that was used before (a clone),
        Forbidden for another machine than the token is for, InvalidRequest naming the field.
        """
        key, fingerprint = read_request(request.csr)
        try:
            token = hash_token(read_token(request.token).secret)
        except Malformed as error:
            raise Unauthenticated(str(error)) from error
        now = self._clock.wall()
        with self._storage.write() as records:
            found = records.identities.invitation(token)
            if found is None:
                raise Unauthenticated("the token is not known here")
            invitation, used = found
            if now > invitation.expires:
                raise Unauthenticated(
                    "the token was used before" if used else "the token is too old: ask for a new one"
                )
            if invitation.hardware is not None and invitation.hardware != request.hardware:
                raise Forbidden("the token is for a machine with another serial number")
            earlier = records.identities.by_key(fingerprint)
            if used:
                member = records.member(invitation.node)
                others = [each for each in earlier if each.node != invitation.node or each.ended]
                if member is None or not earlier or others:
                    raise Unauthenticated("the token was used before")
                certificate = self._certify(records, key, invitation.node, invitation.names, now)
                return self._answer(records, member.node, certificate), []
            if earlier:
                raise Conflict(
                    "the key was enrolled before: every node makes its own, also one that is a copy of another"
                )
            if not records.identities.use(token, now):
                raise Unauthenticated("the token was used before")
            records.identities.admit(invitation.node)
            node, changed = self._register(records, invitation, now)
            certificate = self._certify(records, key, node.id, invitation.names, now)
            return self._answer(records, node, certificate), changed

    def challenge(self, node_id: str) -> str:
        """A nonce for one proof by `node_id`; it says nothing about whether the node is known."""
        return self._nonces.make(check_node_id(node_id))

    def renew(self, request: Renew) -> Enrolled:
        """The next certificate for whoever has a key that counts as the node's, whether its certificate expired or not.

        Raises Unauthenticated, Forbidden when the node was revoked, Conflict for a key of another node or an older one.
        """
        key, fingerprint = read_request(request.csr)
        now = self._clock.wall()
        with self._storage.write() as records:
            proven = self._prove(records, "renew", request.node, request.nonce, request.csr, request.proof)
            if any(known.node != request.node or known.ended for known in records.identities.by_key(fingerprint)):
                raise Conflict("csr: the key was in use before")
            member = records.member(request.node)
            if member is None:
                raise Forbidden("the node was decommissioned")
            # The key that proved itself stays until the new one has: an answer that is lost costs nothing.
            records.identities.keep_only(request.node, {proven.fingerprint, fingerprint}, now)
            certificate = self._certify(records, key, request.node, proven.names, now)
            return self._answer(records, member.node, certificate)

    def leave(self, request: Leave) -> None:
        """Forget a node at its own wish. Raises as `renew`."""
        with self._storage.write() as records:
            self._prove(records, "leave", request.node, request.nonce, "", request.proof)
            self._forget(records, request.node, "decommissioned by itself")

    def revoke(self, node_id: str, reason: str) -> None:
        """Refuse a node from now on. Raises NotFound."""
        now = self._clock.wall()
        with self._storage.write() as records:
            # Also of a node that was only invited: a token that went astray must not open anything.
            if not records.identities.uninvite(node_id) and records.member(node_id) is None:
                raise NotFound(f"no node {node_id!r}")
            records.identities.keep_only(node_id, set(), now)
            records.identities.deny(node_id, reason, now)
            records.set_token(node_id, hash_token(secrets.token_urlsafe(32)), "")

    def forget(self, node_id: str, reason: str = "decommissioned") -> None:
        """Revoke a node and delete what is known of it. Raises NotFound."""
        with self._storage.write() as records:
            if records.member(node_id) is None:
                raise NotFound(f"no node {node_id!r}")
            self._forget(records, node_id, reason)

    def denied(self) -> dict[str, str]:
        with self._storage.read() as records:
            return records.identities.denied()

    def _forget(self, records: Records, node_id: str, reason: str) -> None:
        now = self._clock.wall()
        records.identities.keep_only(node_id, set(), now)
        records.identities.deny(node_id, reason, now)
        records.identities.forget_node(node_id)
        records.drop_documents(node_scope(node_id))

    def _prove(self, records: Records, purpose: str, node: str, nonce: str, body: str, proof: bytes) -> Known:
        """The certificate whose key made the proof. Which keys a node had is told to nobody who has none of them."""
        if records.identities.is_denied(node):
            raise Forbidden("the node was revoked")
        message = proof_bytes(purpose, node, nonce, body)
        for known in records.identities.current(node):
            if is_signed(known.public_key, proof, message):
                self._nonces.use(node, nonce)
                return known
        for known in records.identities.former(node, FORMER_KEYS):
            if is_signed(known.public_key, proof, message):
                # A node throws a key away when its successor works: whoever still has this one was copied, or is the copy.
                log.warning(
                    "%s showed a key that it had replaced: there is a copy of it, or it was restored from one", node
                )
                raise Unauthenticated(
                    "this key was replaced by a newer one: is there a copy of this node? Enrol it again"
                )
        raise Unauthenticated("the proof does not hold: no key known of this node made it")

    def _register(self, records: Records, invitation: Invitation, now: float) -> tuple[Node, list[Issued]]:
        """The node as it is from now on. One that was known before keeps the labels and groups of which the invitation says
        nothing: it comes back by a token for its id alone."""
        # The hash of nothing that anybody knows: a node with a certificate has no token, and one it had ends.
        nothing = hash_token(secrets.token_urlsafe(32))
        before = records.member(invitation.node)
        if before is None:
            node = Node(invitation.node, invitation.tier, invitation.labels, invitation.groups)
            records.add_node(node, nothing, "", now)
        else:
            labels, groups = invitation.labels or before.node.labels, invitation.groups or before.node.groups
            node = Node(invitation.node, invitation.tier, labels, groups)
            records.identities.describe(node)
            records.set_token(node.id, nothing, "")
        changed = self._documents.settings(records, [node]) + self._documents.desired(records, [node])
        return node, changed + self._documents.software(records, [node])

    def _certify(self, records: Records, key: PublicKey, node_id: str, names: Sequence[str], now: float) -> Certificate:
        if records.identities.issued_since(node_id, now - HOUR) >= MAX_CERTIFICATES:
            raise TryAgain(f"{node_id} had {MAX_CERTIFICATES} certificates within an hour")
        certificate = self.authority.issue_node(key, node_id, names, now)
        records.identities.add(
            Known(
                certificate.serial,
                node_id,
                key_fingerprint(key),
                key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
                certificate.issuer,
                tuple(names),
                now,
                certificate.not_after,
            )
        )
        return certificate

    def _answer(self, records: Records, node: Node, certificate: Certificate) -> Enrolled:
        name, trust = self._trust()
        return Enrolled(
            node=node.id,
            tier=node.tier,
            certificate=certificate.chain.decode(),
            bundle=self.authority.bundle().decode(),
            trust=trust,
            trust_name=name,
            labels=dict(node.labels),
            groups=node.groups,
            brokers=self.public.brokers,
            sources=self.public.sources,
            fleet=records.identities.fleet(),
            time=self._clock.wall(),
        )


class Nonces:
    """Made without being stored, good for two minutes and one use. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._used: OrderedDict[str, None] = OrderedDict()
        self._lock = Lock()

    def make(self, node_id: str) -> str:
        head = struct.pack(">d", self._clock.monotonic()) + secrets.token_bytes(16)
        return base64.urlsafe_b64encode(head + self._seal(head, node_id)).decode()

    def use(self, node_id: str, nonce: str) -> None:
        """Raises Unauthenticated for one that is not ours, not this node's, too old or used."""
        try:
            raw = base64.urlsafe_b64decode(nonce.encode())
        except ValueError:
            raw = b""
        head, seal = raw[:24], raw[24:]
        if not hmac.compare_digest(seal, self._seal(head, node_id)):
            raise Unauthenticated("the nonce is not one of this hub's: ask for a new one")
        (made,) = struct.unpack(">d", head[:8])
        if self._clock.monotonic() - made > NONCE_SECONDS:
            raise Unauthenticated("the nonce is too old: ask for a new one")
        with self._lock:
            if nonce in self._used:
                raise Unauthenticated("the nonce was used before: ask for a new one")
            self._used[nonce] = None
            while len(self._used) > MAX_NONCES:
                self._used.popitem(last=False)

    def _seal(self, head: bytes, node_id: str) -> bytes:
        return hmac.digest(self._secret, head + node_id.encode(), "sha256")


def is_signed(public_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the key (DER) made `signature` over `message`."""
    key = load_der_public_key(public_key)
    try:
        if isinstance(key, Ed25519PublicKey):
            key.verify(signature, message)
        elif isinstance(key, EllipticCurvePublicKey):
            key.verify(signature, message, ECDSA(SHA256()))
        else:
            return False
    except InvalidSignature:
        return False
    return True
