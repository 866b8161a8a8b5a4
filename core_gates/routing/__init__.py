"""What all routing gates share: outputs, counts, capacity, losses and schedules."""
