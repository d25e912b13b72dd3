"""Methods around other methods: one for each teacher, schedules, and what they have in common."""
