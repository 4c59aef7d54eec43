"""The contract's engines: row rules on Arrow batches and on requests, dataset rules, enforcement."""
