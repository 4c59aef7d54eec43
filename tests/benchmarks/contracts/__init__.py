"""The contract engines against Pandera and Great Expectations, inside Ray Data, and one record at a time."""
