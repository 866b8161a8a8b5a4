"""Evidence: intervals, paired differences and corrections, computed with numpy only."""
