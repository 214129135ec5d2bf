from typing import Any

# Message classes are made when the module is loaded; none of them has a static type.
def __getattr__(name: str) -> Any: ...
