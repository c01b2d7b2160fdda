"""What models refer to by name and may not be installed: the stand-in for mlflow's names, the check of type
hints it does, and the loader that packages saved here carry with them. Only model processes load it."""
