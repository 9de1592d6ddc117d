"""`flowtrain quality`: figures of sample quality, from features of images."""
