"""Problems and answers: where they come from, how they are cleaned, and the parquet files that verl reads."""
