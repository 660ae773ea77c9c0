NAME="sae_steer"
class Refusing: name="x"
