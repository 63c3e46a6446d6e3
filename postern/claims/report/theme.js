(function () {
  "use strict";
  try {
    var chosen = localStorage.getItem("postern-theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch (error) { /* storage may be switched off: the system's theme it is */ }
  document.documentElement.classList.add("scripted");
})();
