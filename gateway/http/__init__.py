"""The gateway over HTTP. `build.build` makes the ASGI application; the other modules are its parts."""
