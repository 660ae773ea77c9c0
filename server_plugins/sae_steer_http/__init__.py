"""What every host's HTTP side shares: the routes of ``/v1/steering``, profiles as models, bodies, replies, errors."""
