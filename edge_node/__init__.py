"""The edge tier: a gateway that answers locally, asks the cloud for what it cannot answer, and feeds its devices."""
