"""Single environments, all with the same habits.

Each takes `name`, `task`, `frame_skip`, `seed` and `device`; gives `observation` float32 and `reward` float32; sums
rewards over the frames of a step and stops at the end of the episode; marks a time limit as `truncated`; accepts
continuous actions in [-1, 1], clips what lies outside and leaves the tensordict as it is; and can `render`.
"""
