"""SimMIM, reproduced."""
