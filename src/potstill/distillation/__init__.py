"""Train a student to imitate frozen teachers: the Distiller, the teachers and their faster inference, which layers are
read and how they are paired, and the cache of teacher outputs.
"""
