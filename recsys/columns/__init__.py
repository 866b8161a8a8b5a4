"""What one column of a table is: its values, numbers, hashes, quantiles and faulty rows."""
