"""Code as a model writes it, run where it can do no harm.

    python examples/run_code.py

A session is one process that lives over the rounds of a rollout: what one snippet defines the next one has. Slips are
repaired before the code runs, and each repair is reported. What a snippet must not do the kernel refuses.
"""

from PIL import Image

from thyme.sandbox import Sandbox, SandboxConfig

# What a model may well write: no import, a missing colon, a box that leaves the picture.
CROP = """
picture = Image.open(image_path)
if picture.width > 100
    corner = picture.crop((240, 180, 400, 300)).resize((320, 240))
corner.save("corner.png")
"""
VALUE = "print(corner.size, math.hypot(3, 4))"
ESCAPE = "import socket; socket.create_connection(('127.0.0.1', 80))"


def main() -> None:
    photo = Image.new("RGB", (320, 240), "steelblue")
    with Sandbox(SandboxConfig(workers=1, timeout_s=5)) as sandbox:
        print(f"isolation: {sandbox.isolation}")
        with sandbox.session(image=photo, image_path="photo.jpg") as session:
            for name, code in (("crop", CROP), ("value", VALUE), ("escape", ESCAPE)):
                result = session.run(code)
                print(f"{name}: {result.status.name} in {1000 * result.wall_s:.1f} ms")
                for fix in result.fixes:
                    print(f"    fixed    {fix}")
                for image in result.images:
                    print(f"    image    {image.width} x {image.height}")
                if result.stdout:
                    print(f"    printed  {result.stdout.strip()}")
                if result.error:
                    print(f"    error    {result.error.type}: {result.error.message}")


if __name__ == "__main__":
    main()
