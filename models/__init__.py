"""How bytes become answers: tensors, manifests, policy, engines, serving. Knows neither `sync` nor any tier."""
