"""The body of a desired document: which package version answers to which model name on a node. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from models.errors import InvalidManifest
from models.manifest import Blob, Manifest, Variant, choose_variant

MAX_MODELS = 128
"""Models one node may be told to serve."""


class Assignment(msgspec.Struct, frozen=True):
    """One package version, with what is needed to plan its download before its manifest is here.

    `variants` repeats the manifest's, in the same order; a node refuses the package when they differ.
    """

    package: str
    version: str
    manifest: Blob
    golden: Blob
    variants: tuple[Variant, ...]


class Desired(msgspec.Struct, frozen=True):
    """Model name -> what should answer to it. The hub writes it, so a field this release does not know is a later hub's."""

    models: dict[str, Assignment]


def assignment_of(manifest: Manifest, blob: Blob) -> Assignment:
    """The assignment that names `manifest`, whose bytes are `blob`."""
    return Assignment(manifest.package, manifest.version, blob, manifest.golden, manifest.variants)


def decode_desired(body: bytes) -> Desired:
    """Decode a desired document's body. Raises InvalidManifest naming the field."""
    try:
        desired = msgspec.json.decode(body, type=Desired)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(f"desired: {error}") from error
    if len(desired.models) > MAX_MODELS:
        raise InvalidManifest(f"models: {len(desired.models)} given, at most {MAX_MODELS} are accepted")
    return desired


def encode_desired(desired: Desired) -> bytes:
    """The same desired state gives the same bytes: keys are sorted."""
    return msgspec.json.encode(desired, order="sorted")


def digests_of(desired: Desired) -> tuple[str, ...]:
    """Every digest that the body names, sorted: what the envelope must declare."""
    found = set[str]()
    for assignment in desired.models.values():
        found |= {assignment.manifest.digest, assignment.golden.digest}
        found |= {variant.blob.digest for variant in assignment.variants}
    return tuple(sorted(found))


def plan(desired: Desired, engines: Sequence[str]) -> tuple[str, ...]:
    """The digests a node with these engines needs: manifest, golden inputs and one variant of each model.

    Raises NoUsableVariant when a model has none for these engines.
    """
    needed = dict[str, None]()
    for name in sorted(desired.models):
        assignment = desired.models[name]
        for blob in (assignment.manifest, assignment.golden, choose_variant(assignment.variants, engines).blob):
            needed[blob.digest] = None
    return tuple(needed)
