"""What every application shares: runs, experiments, evidence, reports, commands."""
