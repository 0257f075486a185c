"""An emulated link: a relay in a process of its own, with a rate, a delay and bounded queues."""
