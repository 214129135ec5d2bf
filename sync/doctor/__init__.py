"""Checks as a table: each looks at one thing and says what it found and what to do about it. Nothing here changes anything.

    check.py      what a check is          runner.py    in parallel, each bounded         render.py    text and JSON
    node.py       the table of every node  subject.py   what those checks look at         redaction.py no secret gets out

The tiers add their own checks: `edge_node.doctor`, `device_agent.doctor`, `cloud_hub.doctor`.
"""
