"""Files from the network, whole and verified or not at all; and a line that says how far a phase has come."""

import hashlib
import sys
import time
import urllib.error
import urllib.request


class Progress:
    """A line that says how far a phase has come: over itself on a terminal, elsewhere every ten seconds."""

    def __init__(self, label, total_bytes):
        self.label, self.total_bytes = label, total_bytes
        self.start = self.shown = time.time()
        self.terminal = sys.stderr.isatty()

    def show(self, share):
        """share: the part of the whole that is done, 0 to 1."""
        now = time.time()
        if now - self.shown < (0.2 if self.terminal else 10) or share <= 0:
            return
        self.shown, seconds = now, now - self.start
        rate = share * self.total_bytes / seconds / 1e6
        line = f"{self.label} {share:4.0%}  {rate:.1f} MB/s  {seconds / share - seconds:.0f} s left"
        print(f"\r{line}\033[K" if self.terminal else f"{line}\n", end="", file=sys.stderr, flush=True)

    def done(self, result):
        """Replace the live line by a lasting one."""
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(f"{self.label}: {result}, {time.time() - self.start:.1f} s", flush=True)


def download(url, folder, sha256=None):
    """Fetch a file into a folder unless it is there; only a complete, verified file gets its name."""
    path = folder / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    unfinished = path.with_name(path.name + ".unfinished")
    digest, done = hashlib.sha256(), 0
    try:
        response = urllib.request.urlopen(url, timeout=30)
        path.parent.mkdir(parents=True, exist_ok=True)
        with response, open(unfinished, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0)
            progress = Progress(f"downloading {path.name}", total)
            while block := response.read(2**20):
                digest.update(block)
                file.write(block)
                done += len(block)
                progress.show(done / max(total, done))
        if done < total:
            raise ValueError(f"the download of {url} broke off after {done} of {total} bytes: try again")
        if sha256 not in (None, digest.hexdigest()):
            raise ValueError(f"{url} is not the file that was published: its SHA-256 is {digest.hexdigest()}")
        unfinished.rename(path)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ValueError(
            f"can't download {url} ({getattr(error, 'reason', error)}): "
            "get the file some other way and run `python data/prepare.py FILE --name NAME`"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)
    progress.done(f"{done / 1e6:.1f} MB")
    return path
