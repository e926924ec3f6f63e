//! What operators install: the Debian package, the systemd unit, the Helm chart, and what those rely on.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::harness::programs::output;
use crate::harness::{Server, free_port, program, run};

const BINARY: &str = env!("CARGO_BIN_EXE_thalweg");

fn packaging() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging")
}

#[test]
fn the_debian_package_holds_what_runs() {
    let Some(dpkg) = program("dpkg-deb") else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    // A debug binary is large; what stands in its place runs it.
    let stand_in = dir.path().join("thalweg");
    std::fs::write(&stand_in, format!("#!/bin/sh\nexec {BINARY} \"$@\"\n")).expect("a file");
    std::fs::set_permissions(&stand_in, std::fs::Permissions::from_mode(0o755)).expect("an executable");
    let script = packaging().join("deb.sh");
    let package = run(&script, [stand_in.as_os_str(), dir.path().as_os_str()]);
    let package = Path::new(package.trim());
    let version = env!("CARGO_PKG_VERSION");
    let field = |name: &str| run(&dpkg, ["-f", &package.display().to_string(), name]).trim().to_owned();
    assert_eq!((field("Package").as_str(), field("Version").as_str()), ("thalweg", version));
    assert!(field("Depends").contains("libc6 (>= "), "{}", field("Depends"));

    let root = dir.path().join("root");
    run(&dpkg, ["-x".as_ref(), package.as_os_str(), root.as_os_str()]);
    let installed = root.join("usr/bin/thalweg");
    assert_eq!(run(&installed, ["version"]).trim(), format!("thalweg {version}"));
    let settings = root.join("etc/thalweg/thalweg.toml");
    let shown = run(&installed, ["check-config".as_ref(), "--config".as_ref(), settings.as_os_str()]);
    assert!(shown.contains("data_dir = /var/lib/thalweg"), "{shown}");
    for file in ["usr/lib/systemd/system/thalweg.service", "usr/lib/sysusers.d/thalweg.conf", "etc/default/thalweg"] {
        assert!(root.join(file).is_file(), "{file} is missing");
    }
    for page in ["copyright", "README.md", "configuration.md", "operations.md"] {
        assert!(root.join("usr/share/doc/thalweg").join(page).is_file(), "{page} is missing");
    }
    let control = dir.path().join("control");
    run(&dpkg, ["-e".as_ref(), package.as_os_str(), control.as_os_str()]);
    for script in ["postinst", "prerm", "postrm"] {
        run(Path::new("/bin/sh"), ["-n".as_ref(), control.join(script).as_os_str()]);
    }
    let conffiles = std::fs::read_to_string(control.join("conffiles")).expect("conffiles");
    assert!(conffiles.lines().all(|file| root.join(file.trim_start_matches('/')).is_file()), "{conffiles}");
}

#[test]
fn the_systemd_unit_is_valid_and_confined() {
    let Some(analyze) = program("systemd-analyze") else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let text = std::fs::read_to_string(packaging().join("thalweg.service")).expect("a unit");
    // What it names must exist here, which it does only where it is installed.
    let here = text
        .replace("/usr/bin/thalweg", BINARY)
        .replace("User=thalweg", "User=daemon")
        .replace("Group=thalweg", "Group=daemon")
        .replace("Documentation=file:", "# file:");
    let unit = dir.path().join("thalweg.service");
    std::fs::write(&unit, here).expect("a file");
    let verified = output(&analyze, ["verify".as_ref(), unit.as_os_str()]);
    let messages = String::from_utf8_lossy(&verified.stderr).into_owned();
    let about_it: Vec<&str> = messages.lines().filter(|line| line.contains("thalweg.service")).collect();
    assert!(about_it.is_empty(), "{about_it:?}");
    // Tenths of what it counts as exposure, of 100.
    let security =
        output(&analyze, ["security".as_ref(), "--offline=true".as_ref(), "--threshold=20".as_ref(), unit.as_os_str()]);
    assert!(security.status.success(), "{}", String::from_utf8_lossy(&security.stdout));
}

#[test]
fn the_service_manager_is_told() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    // Against hanging alone.
    socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
    let told = || {
        let mut buffer = [0; 100];
        let len = socket.recv(&mut buffer).expect("a message within a minute");
        String::from_utf8_lossy(&buffer[..len]).into_owned()
    };
    let port = free_port();
    let mut server = Command::new(BINARY)
        .args(["serve", "--http", &format!("127.0.0.1:{port}"), "--grpc", "off", "--postgres", "off", "--data-dir"])
        .arg(dir.path().join("data"))
        .env("NOTIFY_SOCKET", &path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the server starts");
    assert_eq!(told(), "READY=1");
    let health = || output(Path::new(BINARY), ["health", "--server", &format!("http://127.0.0.1:{port}")]);
    let ready = health();
    assert!(ready.status.success() && ready.stdout == b"ready\n", "{ready:?}");
    run(Path::new("/bin/kill"), ["-TERM".to_owned(), server.id().to_string()]);
    assert_eq!(told(), "STOPPING=1");
    assert!(server.wait().expect("a child has a state").success());
    let gone = health();
    assert!(!gone.status.success() && String::from_utf8_lossy(&gone.stderr).contains("cannot reach"), "{gone:?}");
}

/// The chart with these values, as `helm template` renders it; only what our templates use is known.
struct Chart {
    values: Value,
}

impl Chart {
    fn new(change: impl FnOnce(&mut Value)) -> Option<Self> {
        let mut values = yaml(&std::fs::read_to_string(packaging().join("helm/thalweg/values.yaml")).expect("values"))?;
        change(&mut values[0]);
        Some(Self { values: values[0].take() })
    }

    /// The documents of a template.
    fn render(&self, template: &str) -> Option<Vec<Value>> {
        let path = packaging().join("helm/thalweg/templates").join(template);
        let text = std::fs::read_to_string(path).expect("a template");
        let mut lines = text.lines();
        let mut out = String::new();
        self.block(&mut lines, true, &BTreeMap::new(), &mut out);
        yaml(&out)
    }

    /// Renders up to the end of a block; tells whether it ended with `else`.
    fn block<'a>(
        &self,
        lines: &mut (impl Iterator<Item = &'a str> + Clone),
        shown: bool,
        variables: &BTreeMap<&str, Value>,
        out: &mut String,
    ) -> bool {
        while let Some(line) = lines.next() {
            let action = line.trim().strip_prefix("{{-").and_then(|l| l.strip_suffix("}}")).map(str::trim);
            match action.map(|a| a.split_once(' ').unwrap_or((a, ""))) {
                Some(("end", _)) => return false,
                Some(("else", _)) => return true,
                Some(("if", condition)) => {
                    // The variables of a block that is not shown have no values.
                    let holds = shown && self.holds(condition, variables);
                    if self.block(lines, shown && holds, variables, out) {
                        self.block(lines, shown && !holds, variables, out);
                    }
                }
                Some(("range", range)) => {
                    let (names, list) = range.split_once(" := ").expect("variables");
                    let (key, value) = names.split_once(", ").expect("two variables");
                    let body = lines.clone();
                    self.block(lines, false, variables, out);
                    for (k, v) in self.value(list, variables).as_object().into_iter().flatten() {
                        let inner = BTreeMap::from([(key, Value::from(k.as_str())), (value, v.clone())]);
                        self.block(&mut body.clone(), shown, &inner, out);
                    }
                }
                Some(("/*", _)) => {}
                Some(("fail", message)) if shown => panic!("the chart fails: {message}"),
                _ if shown => {
                    out.push_str(&self.line(line, variables));
                    out.push('\n');
                }
                _ => {}
            }
        }
        false
    }

    fn holds(&self, condition: &str, variables: &BTreeMap<&str, Value>) -> bool {
        if let Some(condition) = condition.strip_prefix("not ") {
            return !self.holds(condition, variables);
        }
        if condition == r#"and (kindIs "float64" $value) (eq (floor $value) $value)"# {
            return variables["$value"].as_f64().is_some_and(|number| number.fract() == 0.0);
        }
        if let Some(list) = condition.strip_prefix("has (upper $name) (list ").and_then(|l| l.strip_suffix(')')) {
            let name = Value::from(plain(&variables["$name"]).to_uppercase()).to_string();
            return list.split(' ').any(|item| item == name);
        }
        truth(&self.value(condition, variables))
    }

    fn line(&self, line: &str, variables: &BTreeMap<&str, Value>) -> String {
        let Some((before, rest)) = line.split_once("{{ ") else { return line.to_owned() };
        let (action, after) = rest.split_once(" }}").expect("an action ends on its line");
        let mut stages = action.split(" | ");
        let mut value = self.value(stages.next().expect("a value"), variables);
        for stage in stages {
            value = match stage.split_once(' ').unwrap_or((stage, "")) {
                ("toJson", _) => Value::from(value.to_string()),
                ("toString", _) => Value::from(go_text(&value)),
                ("default", other) if !truth(&value) => self.value(other, variables),
                ("default", _) => value,
                other => panic!("{other:?} is not known here"),
            };
        }
        format!("{before}{}{}", plain(&value), self.line(after, variables))
    }

    fn value(&self, text: &str, variables: &BTreeMap<&str, Value>) -> Value {
        match text {
            ".Release.Name" => "release".into(),
            ".Chart.AppVersion" => "1.2.3".into(),
            r#"(printf "%s-auth" .Release.Name)"# => "release-auth".into(),
            r#"printf "%.0f" $value"# => format!("{:.0}", variables["$value"].as_f64().expect("a number")).into(),
            // A setting that is not there is nothing.
            ".Values.settings.TLS_CERT" => self.values["settings"]["TLS_CERT"].clone(),
            ".Values.settings.TLS_CLIENT_CA" => self.values["settings"]["TLS_CLIENT_CA"].clone(),
            text if text.starts_with('$') => variables[text].clone(),
            text => {
                let path = text.strip_prefix(".Values.").unwrap_or_else(|| panic!("{text:?} is not known here"));
                let step = |v: &Value, key| v.get(key).cloned().unwrap_or_else(|| panic!("values have no {path}"));
                path.split('.').fold(self.values.clone(), |v, key| step(&v, key))
            }
        }
    }
}

fn truth(value: &Value) -> bool {
    !matches!(value, Value::Null | Value::Bool(false)) && value != "" && value != &Value::from(0)
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// A value as `toString` of the templates prints it: all numbers are floats to helm, and large ones get an exponent.
fn go_text(value: &Value) -> String {
    match value.as_f64() {
        Some(number) if number != 0.0 && !(1e-4..1e6).contains(&number.abs()) => {
            let text = format!("{number:e}");
            let (digits, exponent) = text.split_once('e').expect("an exponent");
            let exponent: i32 = exponent.parse().expect("a number");
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        _ => plain(value),
    }
}

/// The documents of a YAML text.
fn yaml(text: &str) -> Option<Vec<Value>> {
    let python = program("python3")?;
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("text.yaml");
    std::fs::write(&path, text).expect("a file");
    let convert = "import json, sys, yaml\nprint(json.dumps([d for d in yaml.safe_load_all(open(sys.argv[1])) if d]))";
    let json = run(&python, ["-c".as_ref(), convert.as_ref(), path.as_os_str()]);
    Some(serde_json::from_str(&json).expect("JSON"))
}

#[test]
fn the_helm_chart_renders() {
    let Some(chart) = Chart::new(|values| {
        values["auth"]["file"] = "[[token]]\nname = \"a: 'b'\"\n".into();
        values["settings"]["OBJECT_STORE"] = "s3://bucket/x".into();
        values["settings"]["SERIES_LIMIT"] = 2_000_000.into();
        values["settings"]["FUTURE_MAX"] = 2.5.into();
        values["settings"]["POSTGRES_TLS_REQUIRED"] = false.into();
        values["envFromSecret"] = "keys".into();
        values["persistence"]["storageClass"] = "fast".into();
    }) else {
        return;
    };
    let secret = &chart.render("secret.yaml").expect("YAML")[0];
    assert_eq!(secret["stringData"]["auth.toml"], "[[token]]\nname = \"a: 'b'\"\n");
    let service = &chart.render("service.yaml").expect("YAML")[0];
    let ports: Vec<_> = service["spec"]["ports"].as_array().into_iter().flatten().map(|p| &p["port"]).collect();
    assert_eq!(ports, [7300, 4317]);
    let set = &chart.render("statefulset.yaml").expect("YAML")[0];
    let pod = &set["spec"]["template"]["spec"];
    let server = &pod["containers"][0];
    assert_eq!((&server["image"], &set["spec"]["replicas"]), (&"thalweg:1.2.3".into(), &1.into()));
    assert_eq!(server["envFrom"][0]["secretRef"]["name"], "keys");
    let variable = |name: &str| {
        let mut all = server["env"].as_array().into_iter().flatten();
        all.find(|v| v["name"] == name).map(|v| v["value"].clone()).unwrap_or_default()
    };
    assert_eq!(variable("THALWEG_SERIES_LIMIT"), "2000000");
    assert_eq!(variable("THALWEG_FUTURE_MAX"), "2.5");
    assert_eq!(variable("THALWEG_POSTGRES_TLS_REQUIRED"), "false");
    assert_eq!(go_text(&2_000_000.into()), "2e+06");
    assert_eq!(server["readinessProbe"]["httpGet"].get("scheme"), None);
    assert_eq!(set["spec"]["volumeClaimTemplates"][0]["spec"]["storageClassName"], "fast");
    assert_eq!(service["spec"]["selector"], set["spec"]["template"]["metadata"]["labels"]);
    assert_eq!(set["spec"]["selector"]["matchLabels"], set["spec"]["template"]["metadata"]["labels"]);
    let names = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().filter_map(|v| Some(v["name"].as_str()?.to_owned())).collect()
    };
    assert_eq!(names(&pod["volumes"]), ["tmp", "auth"]);
    assert_eq!(names(&server["volumeMounts"]), ["data", "tmp", "auth"]);
    assert_eq!(pod["volumes"][1]["secret"]["secretName"], "release-auth");
    settings_are_accepted(server);

    let open = Chart::new(|values| values["auth"]["insecure"] = true.into()).expect("YAML");
    assert!(open.render("secret.yaml").expect("YAML").is_empty());
    let service = &open.render("service.yaml").expect("YAML")[0];
    assert_eq!(service["spec"]["ports"].as_array().map(Vec::len), Some(3));
    let set = &open.render("statefulset.yaml").expect("YAML")[0];
    let pod = &set["spec"]["template"]["spec"];
    assert_eq!(pod["volumes"].as_array().map(Vec::len), Some(1));
    settings_are_accepted(&pod["containers"][0]);
}

#[test]
fn the_helm_chart_follows_its_settings() {
    let with = |name: &'static str| Chart::new(|values| values["settings"][name] = "x".into());
    let Some(encrypted) = with("TLS_CERT") else { return };
    let set = &encrypted.render("statefulset.yaml").expect("YAML")[0];
    for probe in ["livenessProbe", "readinessProbe"] {
        assert_eq!(set["spec"]["template"]["spec"]["containers"][0][probe]["httpGet"]["scheme"], "HTTPS", "{probe}");
    }
    let mutual = with("TLS_CLIENT_CA").expect("YAML");
    let set = &mutual.render("statefulset.yaml").expect("YAML")[0];
    for probe in ["livenessProbe", "readinessProbe"] {
        let probe = &set["spec"]["template"]["spec"]["containers"][0][probe];
        assert_eq!((&probe["tcpSocket"]["port"], probe.get("httpGet")), (&"http".into(), None), "{probe}");
    }
    for name in ["HTTP", "POSTGRES", "data_dir"] {
        let chart = with(name).expect("YAML");
        let rendered = std::panic::catch_unwind(|| chart.render("statefulset.yaml"));
        assert!(rendered.is_err(), "settings.{name} stands beside the chart's own");
    }
}

/// The environment of the chart's container is one that the server takes.
fn settings_are_accepted(container: &Value) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let auth = dir.path().join("auth.toml");
    let entry = format!("[[token]]\nname = \"a\"\nsha256 = \"{}\"\nscopes = [\"read\"]\n", "ab".repeat(32));
    std::fs::write(&auth, entry).expect("a file");
    let mut command = Command::new(BINARY);
    command.arg("check-config");
    for variable in container["env"].as_array().expect("an environment") {
        let value = variable["value"].as_str().expect("values are text");
        let value = if value == "/etc/thalweg/auth.toml" { auth.to_str().expect("a path") } else { value };
        command.env(variable["name"].as_str().expect("a name"), value);
    }
    let out = command.output().expect("it runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn probes_of_the_chart_are_answered() {
    let Some(chart) = Chart::new(|_| ()) else { return };
    let set = &chart.render("statefulset.yaml").expect("YAML")[0];
    let container = &set["spec"]["template"]["spec"]["containers"][0];
    let server = Server::start();
    for probe in ["livenessProbe", "readinessProbe"] {
        let path = container[probe]["httpGet"]["path"].as_str().expect("a path");
        assert_eq!(server.client().get(path).status, 200, "{path}");
    }
}
