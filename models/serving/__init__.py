"""The serving path: predictors that wrap one another, the repository they read, and the frontends that translate."""
