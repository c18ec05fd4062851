"""Pipeline parallelism: schedules as tables, what they would cost, and the program that runs them."""
