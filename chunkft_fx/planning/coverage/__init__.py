"""What a step trains, where the user leaves that to the planner."""
