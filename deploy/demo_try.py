"""What to type while the demo is left running."""

from __future__ import annotations

from deploy.local import TENANT, Cluster


def how_to_try(cluster: Cluster) -> str:
    """URLs, and a line of curl and of Python for each."""
    edge, cloud, hub = cluster.urls["edge-1"], cluster.urls["cloud-1"], cluster.urls["hub"]
    token = cluster.hub_data / "admin.token"
    body = '{"inputs":[{"name":"image","datatype":"FP32","shape":[1,64],"data":[' + ",".join(["0"] * 64) + "]}]}"
    device = cluster.folder / "device-1" / "node.toml"
    return f"""
left running; Ctrl-C ends it

edge   {edge}
  curl -s {edge}/v2/models/digits/infer -d '{body}'
  python -c "import tritonclient.http as t; print(t.InferenceServerClient('{edge[7:]}').get_model_metadata('digits'))"
cloud  {cloud}
  curl -s {cloud}/v2/models/digits
  python -c "import urllib.request as u; print(u.urlopen('{cloud}/v2').read().decode())"
hub    {hub} (documentation at {hub}/docs)
  curl -s -H "authorization: Bearer $(cat {token})" {hub}/api/v1/nodes
  tierline nodes --hub {hub} --token-file {token}
device (its own process already runs as {TENANT}.device-1; a second one needs a node of its own)
  tierline node-add {TENANT}.device-2 --tier device --hub {hub} --token-file {token}
  its configuration to copy: {device}
broker {cluster.broker.url}, log {cluster.folder / "broker" / "broker.log"}
""".strip()
