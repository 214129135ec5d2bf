"""Small real models that ship with the project, each with the recipe that made it."""
