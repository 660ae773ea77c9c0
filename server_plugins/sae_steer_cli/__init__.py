"""The command ``sae-steer``: above the hosts, and without their dependencies until a command needs them."""
