"""The transports seen from the robot. Needs the base install only."""
