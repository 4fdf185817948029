"""What a VM's balloon, and its host, can and cannot do: facts are gathered, judged by pure rules, and shown.

``vm`` and ``host`` gather facts; ``vm_rules`` and ``host_rules`` are the tables of findings; ``report`` makes
text of them. Nothing here changes a guest.
"""
