// A question to /predict, as a person would write it down.

const MOST = 32; // files in one request, as the server's default has it

/** `names` of files and the query -> {curl, python} */
export function codeFor(names, question, needsKey) {
  const files = names.slice(0, MOST);
  const url = new URL("predict", location.href.split("#")[0]);
  return { curl: curl(files, `${url}?${question}`, needsKey), python: python(files, url, question, needsKey) };
}

function curl(names, url, needsKey) {
  const parts = names.map((name) => `-F ${shell(`file=@"${name.replace(/["\\]/g, "\\$&")}"`)}`);
  const key = needsKey ? ['-H "Authorization: Bearer $IMAGO_API_KEY"'] : [];
  return ["curl", ...key, ...parts, shell(url)].join(" \\\n  ");
}

const shell = (word) => `'${word.replaceAll("'", "'\\''")}'`;

function python(names, url, question, needsKey) {
  const text = JSON.stringify; // a JSON string is a Python string
  const fields = [...new URLSearchParams(question)];
  const params = fields.map(([name, value]) => `(${text(name)}, ${text(value)})`).join(", ");
  const key = needsKey ? '\n    headers={"Authorization": f"Bearer {os.environ[\'IMAGO_API_KEY\']}"},' : "";
  return `${needsKey ? "import os\n\n" : ""}import httpx

paths = [${names.map(text).join(", ")}]
answer = httpx.post(
    ${text(String(url))},
    params=[${params}],
    files=[("file", open(path, "rb")) for path in paths],${key}
)
${fields.filter(([name]) => name === "model").length > 1 ? EACH_MODEL : EACH_IMAGE}`;
}

const EACH_IMAGE = `for result in answer.json()["results"]:
    print(result)
`;
const EACH_MODEL = `for model in answer.json()["models"]:
    for result in model["results"]:
        print(model["model"], result)
`;
