"""What the tests stand on: a real PostgreSQL, processes, records to send and the ledger that judges."""
