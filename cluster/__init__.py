"""Where Tidegate runs: settings, Ray session, clock, tables, database, durable log, alerts."""
