"""What the stages share. Never imports a stage."""
