"""Train a student to imitate frozen teachers: Distiller, teachers, layers that are read and paired, teacher cache."""
