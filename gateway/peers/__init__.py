"""Peers: the other gateways of one installation, found by a DNS name.

They tell each other which version each alias serves, and the verdicts that the registry cannot hold. Nothing
waits for a peer: one that is lost, slow or lying costs what it has to say, and never a request.

`keys` (the shared secret: who may speak), `messages` (what is said, as bytes), `exchange` (to whom and when),
`refusals` (why a message is not believed), `series` (the metrics). Knows what `rollouts.verdicts` says of an
alias; must not know HTTP routes.
"""

from gateway.peers.exchange import Peers
from gateway.peers.refusals import RefusalKind, Refused

__all__ = ["Peers", "RefusalKind", "Refused"]
