"""Any step over a sequence: scan, Recurrent, explain."""
