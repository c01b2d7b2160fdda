"""What an operator can ask of a running gateway: views and verbs, without a protocol.

Every method runs on the event loop. Views return plain JSON-ready dicts (CONTRACT §8 has their fields);
verbs raise `Problem`.

Interface (being written):
    class Operations:
        def models(self) -> dict                                  # GET /models
        def model(self, name) -> dict                             # GET /models/NAME
        def version(self, name, version, *, example: bool) -> dict  # GET /models/NAME/versions/V
        async def promote(self, name, alias, version, *, expect=UNSET|None|str, force=False, wait=False, dry_run=False) -> tuple[int, dict]   # (status, body)
        async def delete_alias(self, name, alias) -> dict
        async def rollback(self, name, alias, to=None, *, wait=False) -> tuple[int, dict]
        async def load(self, reference, wait=True) -> tuple[int, dict]; async def unload(self, reference, wait=True) -> tuple[int, dict]
        async def refresh(self) -> dict
        def rollouts(self) -> dict ; def rollout(self, name, alias) -> dict
        def ready(self) -> tuple[bool, dict]
        def memory(self) -> dict   # limit_bytes, reserved, resident, closing
"""
