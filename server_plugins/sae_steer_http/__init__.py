"""What every host's HTTP side shares: the routes of ``/v1/steering``, profiles as models, bodies, replies, errors.

And, in ``client``, what asks such a server.
"""

ADMIN_HEADER = "X-Steering-Admin-Key"
"""Where a client sends the key of what changes a server's state."""
