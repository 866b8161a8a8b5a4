"""What a sizing network attends to, and figures of it."""
