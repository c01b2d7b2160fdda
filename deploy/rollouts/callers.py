"""Sends flowers to iris@champion and prints, each second, which version answered how many of them.

python callers.py http://127.0.0.1:8080 [REQUESTS PER SECOND]
"""

import json
import random
import sys
import time
from collections import Counter
from urllib.error import HTTPError
from urllib.request import Request, urlopen

url, rate = sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 50.0
answers: Counter[str] = Counter()
due = printed = time.monotonic()
while True:
    petal = random.uniform(1.0, 6.9)
    flower = {"sepal_length": 5.9, "sepal_width": 3.1, "petal_length": petal, "petal_width": petal / 3}
    body = json.dumps({"dataframe_records": [flower]}).encode()
    try:
        with urlopen(Request(f"{url}/predict/iris", body, {"Content-Type": "application/json"})) as answer:
            answers[f"{answer.status} by version {answer.headers['X-Model-Version']}"] += 1
    except HTTPError as error:
        answers[f"{error.code}"] += 1
    if time.monotonic() - printed >= 1:
        shown = ", ".join(f"{count} × {what}" for what, count in sorted(answers.items()))
        print(time.strftime("%H:%M:%S"), shown, flush=True)
        answers.clear()
        printed = time.monotonic()
    due = max(due + 1 / rate, time.monotonic())
    time.sleep(max(0.0, due - time.monotonic()))
