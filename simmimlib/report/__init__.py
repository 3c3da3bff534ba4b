"""What came out: finished runs, statistics, tables, figures. Trains nothing."""
