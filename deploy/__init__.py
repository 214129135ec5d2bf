"""Ways to put the system somewhere. Imports no tier: it spawns commands and speaks to them over their public interfaces."""
