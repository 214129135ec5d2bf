"""How tiers agree over a bad network: messages, link, trust, store, updater. Knows neither `models` nor any tier."""
