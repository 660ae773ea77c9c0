"""What ``sae-steer selftest`` checks, through the HTTP API alone; nothing here knows a host's code.

:mod:`.client` asks, :mod:`.answers` compares, :mod:`.subject` is the server under test with what was found out about
it; :mod:`.first`, :mod:`.effect`, :mod:`.batch`, :mod:`.cache` and :mod:`.forms` hold the checks, :mod:`.run` their
order.
"""
