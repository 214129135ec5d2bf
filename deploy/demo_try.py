"""What to type while the demo is left running: a line of curl and a line of Python for every role, ready to paste."""

from __future__ import annotations

import sys

from deploy.local import Cluster
from models.zoo import digits


def how_to_try(cluster: Cluster) -> str:
    """The lines. Prepares a second device, so that the SDK can be tried from a shell of one's own."""
    python = f"{sys.executable} -c"
    edge, cloud, hub = cluster.urls["edge-1"], cluster.urls["cloud-1"], cluster.urls["hub"]
    token = cluster.hub_data / "admin.token"
    images, labels = digits.held_out()
    pixels = ",".join(f"{value:.1f}" for value in images[0])
    body = f'{{"inputs":[{{"name":"image","datatype":"FP32","shape":[1,64],"data":[{pixels}]}}]}}'
    device = cluster.configure_device("device-2", edge="edge-1")
    bearer = f"headers={{'authorization': 'Bearer ' + open('{token}').read().strip()}}"
    get = "import urllib.request as u; print(u.urlopen(u.Request"
    return f"""
left running; Ctrl-C ends it. The picture in these lines shows a {labels[0]}.

edge: {edge}
curl -s {edge}/v2/models/digits/infer -d '{body}'
{python} "{get}('{edge}/v2/models/digits')).read().decode())"

cloud: {cloud}
curl -s {cloud}/v2/models/digits/infer -d '{body}'
{python} "{get}('{cloud}/v2/models/digits')).read().decode())"

device, through the SDK and as a process on standard input:
{python} "from device_agent import BlockingAgent as A; a = A('{device}').__enter__(); a.wait_for('digits'); \
print(a.infer('digits', {{'image': [[{pixels}]]}})); a.__exit__()"
echo '{{"model":"digits","inputs":{{"image":[[{pixels}]]}}}}' | {sys.executable} -m tierline device {device}

hub: {hub} (documentation at {hub}/docs)
curl -s -H "authorization: Bearer $(cat {token})" {hub}/api/v1/nodes
{python} "{get}('{hub}/api/v1/nodes', {bearer})).read().decode())"

broker: {cluster.broker.url}, log {cluster.folder / "broker" / "broker.log"}
""".strip()
