"""Start, stop and examine the containers of compose.yml: what `make up down logs health` call. Standard library only."""
import argparse
import configparser
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

HERE = Path(__file__).resolve().parent
OTHER_USER = 10001  # runs the containers when root starts them
SECONDS = 600  # to build, start and become healthy
PORTS = {"SERVICE": 8000, "PROMETHEUS": 9090, "GRAFANA": 3001, "APP": 7860, "DASH": 8050, "LAB": 8888, "MLFLOW": 5000}


def ports(env):
    "What answers where, by name: (profile, URL)."
    at = lambda section, name, path: f"http://127.0.0.1:{env.get(f'HMS_{section}_{name}_PORT') or PORTS[name]}{path}"
    return {"service": ("core", at("DEPLOYMENT", "SERVICE", "/health/ready")), "prometheus": ("monitor", at("MONITORING", "PROMETHEUS", "/-/ready")),
            "grafana": ("monitor", at("MONITORING", "GRAFANA", "/api/health")), "app": ("dash", at("DEPLOYMENT", "APP", "/")), "dash": ("dash", at("DEPLOYMENT", "DASH", "/")),
            "lab": ("dev", at("DEPLOYMENT", "LAB", "/api")), "mlflow": ("track", at("DEPLOYMENT", "MLFLOW", "/health"))}


def write_private(path, text, owner):
    "Write a file that only its owner reads."
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as f: f.write(text)
    os.chmod(path, 0o600)
    if os.getuid() == 0: os.chown(path, owner, owner)


def prepare(folder=HERE):
    "Make what the first start needs: folders, secrets, the user of the containers. What is there stays."
    uid = os.getuid() or OTHER_USER
    gid = os.getgid() if os.getuid() else OTHER_USER
    state, runs = folder / "state", folder.parent / "outputs/runs"  # MLflow keeps its file among the runs
    for name in ("", "secrets", "outputs", "outputs/tmp", "prometheus", "grafana"): (state / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    runs.mkdir(parents=True, exist_ok=True)
    (folder.parent / "data").mkdir(exist_ok=True)
    if os.getuid() == 0:
        for path in (state, *(p for p in state.iterdir() if p.is_dir()), state / "outputs/tmp", runs, runs / "mlflow.db"):
            if path.exists(): os.chown(path, uid, gid)
    for name in ("hms_secret", "grafana_password"):
        if not (path := state / "secrets" / name).exists(): write_private(path, secrets.token_urlsafe(48), uid)
    if not (token := state / "secrets" / "metrics_token").exists(): write_private(token, "", uid)
    env = folder / ".env"
    kept = [line for line in env.read_text().splitlines() if not line.startswith(("HMS_UID=", "HMS_GID="))] if env.exists() else []
    write_private(env, "\n".join([*kept, f"HMS_UID={uid}", f"HMS_GID={gid}"]) + "\n", os.getuid())
    return state


def compose(*words, capture=False):
    "Run docker compose on our file."
    command = ["docker", "compose", "--project-directory", str(HERE), "--file", str(HERE / "compose.yml"), *words]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None, env=settings())


def clear(folder):
    "Remove what a container that was killed left in the folder of its uploads."
    for path in folder.iterdir(): shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def need_engine():
    "Leave with a clear line when there is nothing that runs containers."
    if not shutil.which("docker"): sys.exit("docker is not installed; without containers: hms serve, then make health")
    for words, what in ((["compose", "version"], "docker has no compose plugin (version 2 or newer)"), (["info"], "docker is installed, but its daemon does not answer")):
        if subprocess.run(["docker", *words], capture_output=True).returncode: sys.exit(f"{what}; without containers: hms serve, then make health")


def up(profiles):
    "Start profiles and wait until everything is healthy."
    need_engine()
    state = prepare()
    chosen = [w for p in profiles for w in ("--profile", p)]
    if {"monitor", "dash"} & set(profiles):  # Prometheus reads the file at every scrape, the dashboards when they start
        compose("--profile", "monitor", "build", "serve")
        token = compose("--profile", "monitor", "run", "--rm", "--no-deps", "-T", "serve", "hms", "token", "create", "--scope", "metrics", "--subject", "prometheus", "--ttl", "365d", capture=True).stdout
        write_private(state / "secrets" / "metrics_token", token.strip(), os.getuid() or OTHER_USER)
    try: compose(*chosen, "up", "--detach", "--build", "--wait", "--wait-timeout", str(SECONDS))
    except subprocess.CalledProcessError as e: sys.exit(f"not everything became healthy (docker compose said {e.returncode}); see make logs")
    for name, (profile, url) in ports(settings()).items():
        if profile in profiles or (name == "service" and "monitor" in profiles): print(f"{name:<12}{url}")
    if "monitor" in profiles: print(f"Grafana: user admin, password in {state / 'secrets' / 'grafana_password'}")


def settings(folder=HERE):
    "The ports of settings.ini, then deploy/.env, then the environment; an empty value says nothing."
    ini = configparser.ConfigParser(inline_comment_prefixes=("#",), interpolation=None)
    ini.read(folder.parent / "settings.ini")
    own = {f"HMS_{section}_{key}".upper(): value for section in ("deployment", "monitoring") if ini.has_section(section) for key, value in ini[section].items() if key.endswith("_port")}
    lines = (folder / ".env").read_text().splitlines() if (folder / ".env").exists() else []
    named = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return own | {k: v for k, v in (*named.items(), *os.environ.items()) if v}


def ask(url):
    "ok, or what is wrong."
    try:
        with urlopen(url, timeout=5) as reply: return "ok" if reply.status == 200 else f"status {reply.status}"
    except HTTPError as e: return f"status {e.code}"
    except OSError as e: return "does not answer" if "refused" in str(e) else f"does not answer ({e})"


def health(profiles, wait):
    "Ask everything that the profiles should run; 1 unless all of it answers."
    end = time.monotonic() + wait
    asked = {name: url for name, (profile, url) in ports(settings()).items() if profile in profiles or (name == "service" and "monitor" in profiles)}
    while True:
        found = {name: ask(url) for name, url in asked.items()}
        good = all(v == "ok" for v in found.values())
        if good or time.monotonic() >= end: break
        time.sleep(1)
    for name, verdict in found.items(): print(f"{name:<12}{verdict:<24}{asked[name]}")
    return 0 if good else 1


def main():
    "Read the command line."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=["up", "down", "logs", "health", "secrets"])
    parser.add_argument("words", nargs="*", help="profiles: core dash monitor track dev; for logs: services")
    parser.add_argument("--wait", type=float, default=0, help="health: seconds to wait for it")
    given = parser.parse_args()
    profiles = given.words or ["core"]
    known = {"core", "dash", "monitor", "track", "dev"}
    if given.verb in ("up", "health") and (bad := set(profiles) - known): parser.error(f"no profile {min(bad)}; there are {', '.join(sorted(known))}")
    if given.verb == "secrets": print(prepare() / "secrets")
    elif given.verb == "up": up(profiles)
    elif given.verb == "health": sys.exit(health(profiles, given.wait))
    else:
        need_engine()
        every = [w for p in sorted(known) for w in ("--profile", p)]
        prepare()
        compose(*every, *(["down", "--remove-orphans", "--timeout", "40"] if given.verb == "down" else ["logs", "--tail", "100", *given.words]))
        if given.verb == "down": clear(HERE / "state/outputs/tmp")


if __name__ == "__main__":
    main()
