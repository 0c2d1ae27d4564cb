"""Passes over programs: where weights are fetched, values offloaded and states copied within a step. Internal."""
