"""Who may ask and how much: tokens, client certificates, tenants, TLS. Implements `models.serving.caller.Access`."""
