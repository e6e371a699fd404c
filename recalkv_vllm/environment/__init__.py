"""What this machine and this installation have: found without failing, whatever is broken."""
