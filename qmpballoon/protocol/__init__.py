"""The published objects and the requests, independent of the transport."""
